"""Requests to hosts that other parties name: which addresses may be reached, and connections that reach no other. Also
an HTTP server that other parties may send requests to.

Front door: `address_rules`, `address_guard`, `bounded_server`, `ip_ranges`, and, where urllib3 is installed,
`http_client` and `http_replies`.
"""
