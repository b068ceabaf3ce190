"""How artifact tokens are measured, in features of any model or bundle. No PyTorch."""
