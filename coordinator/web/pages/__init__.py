"""The pages for people, rendered here: one module a page."""
