from small_project import project

__all__ = ["project"]
