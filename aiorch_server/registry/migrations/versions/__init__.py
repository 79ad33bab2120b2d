"""One module for each migration; what was released is not changed any more."""
