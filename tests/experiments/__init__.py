"""Small experiments after the paper's, each a program whose figures come from jobs submitted through the API."""
