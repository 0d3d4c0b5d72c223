"""One engine for every run: a request, its protocol, work items, files written whole or not at all, and the record."""
