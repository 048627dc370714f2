"""HTTP: routes, what turns bodies into photos and masks into answers, keys, the API's document."""
