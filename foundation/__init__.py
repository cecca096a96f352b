"""What coordinator and agents agree on: values, words and the wire."""
