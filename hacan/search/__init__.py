"""An index over a user's own images: `Index.open(path).search("two dogs run on grass")`."""

from hacan.search.index import Index, Result
from hacan.search.sync import Update

__all__ = ["Index", "Result", "Update"]
