"""Results that are not finite are repeated without the kernel, once, and said."""

import pytest
import torch

from ark.patches.guard import OVERRIDE, PLAIN, add_guard, doubted


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


def test_who_looks_later_is_told_and_repeats_it():
    model, runs = Model(), []
    add_guard(model, "bad")

    def executor(guider, sigmas, extra_args):
        plain = bool(extra_args["model_options"]["transformer_options"].get(PLAIN))
        runs.append(plain)
        return torch.tensor([1.0 if plain or len(runs) == 1 else float("nan")])

    def run():
        return model.wrapper(executor, None, None, {"model_options": {"transformer_options": {}}})

    with doubted() as doubts:
        assert run().isfinite() and len(doubts) == 1
    assert doubts[0]() and runs == [False]
    for _ in range(2):  # the second time nobody has repeated it
        with doubted() as doubts:
            assert run().isnan()
        assert not doubts[0]()
    assert runs == [False] * 3 and not model.wrapper.failed
    assert run().isfinite() and runs[3:] == [True]
    assert model.wrapper.failed and not model.wrapper.repeats


def test_whoever_is_not_among_them_waits():
    model, runs = Model(), []
    add_guard(model, "bad")

    def executor(guider, sigmas, extra_args):
        runs.append(bool(extra_args["model_options"]["transformer_options"].get(PLAIN)))
        return torch.tensor([1.0 if runs[-1] else float("nan")])

    with doubted():
        pass
    options = {"model_options": {"transformer_options": {}}}
    assert model.wrapper(executor, None, None, options).isfinite() and runs == [False, True]
