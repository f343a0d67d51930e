"""What attaches the engine to a model object: on a clone, under a key, reversibly."""
