"""A module that is imported lazily is the module, only later."""

import sys

import pytest

from ark.toolkit.lazy import import_lazily


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "ark_lazy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "slow.py").write_text("import sys\nsys.ark_ran = True\nvalue = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "ark_lazy_package.slow"
    for name in [name for name in sys.modules if name.startswith("ark_lazy_package")]:
        del sys.modules[name]
    vars(sys).pop("ark_ran", None)


def test_it_runs_when_it_is_read(package):
    import_lazily(package)
    import ark_lazy_package.slow

    assert not hasattr(sys, "ark_ran")
    from ark_lazy_package.slow import value

    assert value == 3 and sys.ark_ran and ark_lazy_package.slow.value == 3
    module = sys.modules[package]
    import_lazily(package)
    assert sys.modules[package] is module


def test_what_is_not_there_stays_away():
    for name in ("ark_no_such_package.part", "email.ark_no_such_part"):
        import_lazily(name)
        assert name not in sys.modules
