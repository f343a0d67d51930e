"""The engine: loading, kernels, schedule, hardware facts. Knows no host."""
