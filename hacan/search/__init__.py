"""An index over a user's own pictures: `Index.open(path).search("two dogs run on grass")`."""

from hacan.search.following import Update
from hacan.search.index import Index, Result

__all__ = ["Index", "Result", "Update"]
