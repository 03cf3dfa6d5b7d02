"""The pictures of an inspect job: numbers in, figures out, without a display and without pyplot's global state."""
