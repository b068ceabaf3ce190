"""Sign students and bundles with a private key, and refuse those that another key signed, or that were changed.

A hash inside a bundle stops accidents, and a signature stops people: whoever changes a file can correct its hash, but
cannot sign without the private key. The format is OpenSSF Model Signing (OMS), a detached signature over the sha256 of
each file, which other programs read too. Needs the extra ``sign`` (model-signing), which is imported on use.
"""

from phreg_deploy.signing.signature import Signed, sign
from phreg_deploy.signing.verification import read_signed, verify_signature

__all__ = ["Signed", "read_signed", "sign", "verify_signature"]
