"""One router per group of paths; every route carries its full path."""
