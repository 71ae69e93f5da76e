"""`messages --cluster`: jobs a second over the primaries of a cluster. Other modules import `scale` from here."""
