"""What a timm block looks like to this library, and the modules that replace one."""
