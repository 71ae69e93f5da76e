"""Object stores behind one interface. Front door: `base` (the interface) and `factory` (the choice)."""
