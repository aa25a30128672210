"""Arrays of any library: their formats and namespaces, transfer, dispatch and checks."""
