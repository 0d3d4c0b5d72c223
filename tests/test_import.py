import importlib

import ddim


def test_every_public_name_is_there_and_public_at_home():
    for name, home in ddim._HOME_OF.items():
        assert getattr(ddim, name) is getattr(importlib.import_module(f"ddim.{home}"), name)
        assert name in importlib.import_module(f"ddim.{home}").__all__
    assert set(ddim.__all__) <= set(dir(ddim))
