# Configures, builds and runs the project in SOURCE_DIR; WAY says how it finds calm.
file(REMOVE_RECURSE ${BUILD_DIR})
execute_process(
  COMMAND
    ${CMAKE_COMMAND} -S ${SOURCE_DIR} -B ${BUILD_DIR} -G ${GENERATOR} -D CMAKE_CXX_COMPILER=${COMPILER} -D WAY=${WAY} -D
    CMAKE_PREFIX_PATH=${CALM_PREFIX} -D CALM_SOURCE_DIR=${CALM_SOURCE_DIR} COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_COMMAND} --build ${BUILD_DIR} COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${BUILD_DIR}/consumer OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
message("${output}")
if(output STREQUAL "")
  message(FATAL_ERROR "the program printed nothing")
endif()
