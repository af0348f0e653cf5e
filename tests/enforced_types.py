"""What enforces the annotations of the package under pytest: beartype, for which, as in PEP 484, an int is a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
