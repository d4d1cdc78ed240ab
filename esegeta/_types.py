"""The arrows that everything else is made of. Names only, no code.

``S`` is one, two or three spatial axes; an example never carries a batch axis.
"""

from collections.abc import Callable

from torch import Tensor

Model = Callable[..., Tensor]
Score = Callable[[Tensor], Tensor]
Reducer = Callable[..., Score]
Rewrite = Callable[[Score], Score]
Explain = Callable[..., Tensor]
Method = Callable[..., Explain]
Transform = Callable[..., Explain]
