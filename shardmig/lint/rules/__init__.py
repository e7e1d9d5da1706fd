"""The rules: one reason to refuse a class, listed once, in order."""
