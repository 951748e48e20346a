"""A spec whose import fails."""

import library_that_is_not_there  # noqa: F401
