"""How systems are driven: over HTTP, as servers started here, in this process, or in simulation."""
