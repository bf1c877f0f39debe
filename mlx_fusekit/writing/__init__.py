"""The one room through which everything is written: files and folders."""
