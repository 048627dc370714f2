"""HTTP: routes, request bodies, answers, keys, and the API's document."""
