"""EST, the device API, OCSP and CRL over aiohttp."""
