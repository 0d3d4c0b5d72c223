"""One engine for runs: a request, its protocol, work items, whole files, and the record."""
