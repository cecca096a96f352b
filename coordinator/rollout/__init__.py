"""Models under control: which personal models devices have, who may serve a new one, and who decided."""
