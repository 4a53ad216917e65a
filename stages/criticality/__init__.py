"""What `critical` is made of: checkers of answers, and the judge that replaces tokens."""
