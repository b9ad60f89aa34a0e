"""HTTP interface: routes, schemas, RFC 9457 errors and the application factory."""
