"""The server: listeners, EST, MQTT relay, OCSP and CRL, the operators' commands."""
