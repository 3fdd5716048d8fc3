"""A build from request to engine folder."""
