"""Programs and adapters as files, merged weights as model folders."""
