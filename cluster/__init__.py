"""The room for Ray: everything that places distot on a cluster. See cluster/README.md for what is here today."""
