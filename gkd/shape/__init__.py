"""`gkd shape`: which student to cut out of a teacher. Sizes that could be, planned for all and measured for some."""
