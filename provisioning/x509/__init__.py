"""Certificates, requests, lists and OCSP answers."""
