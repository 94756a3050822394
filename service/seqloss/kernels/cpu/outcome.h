// What a kernel returns that may not do as it is told.
#pragma once

// An exception ends the process where it leaves a library, or a thread of OpenMP's.
enum Outcome : int {
  DONE,
  WRONG_ROWS,  // sequences name rows that are not there; nothing was computed
  NO_MEMORY,
};
