"""The engines of a run as one pool: dispatch, health, restarts, the router."""
