"""SINDER (arXiv 2407.16826): train the singular values of linear layers, so that defective tokens equal neighbours."""
