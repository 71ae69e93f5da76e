"""Requests to hosts that other parties name: which addresses may be reached, and connections that reach no other.

Front door: `address_rules`, `address_guard`, `ip_ranges`, and, where urllib3 is installed, `http_client` and
`http_replies`.
"""
