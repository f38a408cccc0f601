"""The token seam: the only room that knows PKCS#11."""
