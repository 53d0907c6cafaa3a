# Runs PROGRAM, which must succeed and print something.
execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
message("${output}")
if(output STREQUAL "")
  message(FATAL_ERROR "${PROGRAM} printed nothing")
endif()
