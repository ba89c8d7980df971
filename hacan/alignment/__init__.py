"""The fine alignment: EncodedImages x EncodedTexts -> scores [image, text] (METHOD sections 2 and 3).

Every module of this folder is imported, so that a form in a new file is registered.
"""

import importlib
import pkgutil

from hacan.alignment.base import FORMS, FineAlignment, build_alignment, form_of, hyperparameters_of, register
from hacan.alignment.hybrid import HybridAlignment
from hacan.alignment.revised import RevisedAlignment
from hacan.alignment.scoring import LEVELS, STREAMS
from hacan.types import pack_texts

__all__ = ["FORMS", "LEVELS", "STREAMS", "FineAlignment", "HybridAlignment", "RevisedAlignment"]
__all__ += ["build_alignment", "form_of", "hyperparameters_of", "pack_texts", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
