"""What the fork server of a rank group imports first: from then on it ends when the group's first process
does, in the middle of its imports, too. It would otherwise go on importing for seconds and then start a
rank for a group that is gone.

The ranks themselves are told by the link (encoder/link.py): a signal of this kind is not inherited.
"""

from __future__ import annotations

import os

from encoder.link import PARENT_VARIABLE
from shoal.child import end_with_parent

__all__ = ()

end_with_parent(int(os.environ[PARENT_VARIABLE]))
