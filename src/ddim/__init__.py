"""Denoising diffusion implicit models: trained, sampled, inverted, interpolated and judged.

``ddim.X`` is every public name. ``__init__.pyi`` lists the names with their modules, and each is
loaded when it is first used, so ``import ddim`` loads neither torch nor diffusers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
