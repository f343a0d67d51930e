"""Results that are not finite are repeated without the kernel, once, and said."""

import pytest
import torch

from ark.patches.guard import OVERRIDE, PLAIN, add_guard


class Model:
    def add_wrapper_with_key(self, kind, key, wrapper):
        self.kind, self.wrapper = kind, wrapper

    def remove_wrappers_with_key(self, kind, key):
        pass


@pytest.mark.parametrize("host_is_fine", [True, False])
def test_a_run_is_repeated_and_the_kernel_spared_if_that_helped(host_is_fine, caplog):
    model, runs = Model(), []
    add_guard(model, "bad")
    options = {"model_options": {"transformer_options": {OVERRIDE: print, "kept": 1}}}

    def executor(guider, sigmas, extra_args, *rest):
        transformer = extra_args["model_options"]["transformer_options"]
        assert transformer["kept"] == 1 and rest == ("noise",)
        runs.append(OVERRIDE in transformer)
        assert transformer.get(PLAIN, False) != runs[-1]
        return torch.tensor([float("nan") if runs[-1] or not host_is_fine else 1.0])

    for _ in range(2):
        result = model.wrapper(executor, None, None, options, "noise")
        assert bool(result.isfinite()) == host_is_fine
    assert runs == ([True, False, False] if host_is_fine else [True, False] * 2)
    assert options["model_options"]["transformer_options"][OVERRIDE] is print
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (1 if host_is_fine else 2)
    message = messages[0]
    assert ("bad gave numbers" in message) == host_is_fine
    assert host_is_fine or "on ComfyUI's own code, too" in message
