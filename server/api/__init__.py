"""HTTP faces: routes, middleware, and where an error becomes a response."""
