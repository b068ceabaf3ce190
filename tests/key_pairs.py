"""Pairs of keys for signatures."""


def write_pair(folder, name="key", curve="SECP256R1", password=None):
    """Write NAME.pem and NAME.pub, as openssl does."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / f"{name}.pem").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return folder / f"{name}.pem", folder / f"{name}.pub"
