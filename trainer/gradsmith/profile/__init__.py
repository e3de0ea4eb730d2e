"""`gradsmith profile`: what stands in a table before anything is trained."""
